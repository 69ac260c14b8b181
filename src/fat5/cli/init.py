"""`fat5 init`: writes a commented recipe for a language, a size and a device."""

from typing import Literal


def init(
    language: str = "",
    size: Literal["demo", "small", "base", "large"] | None = None,
    device: str | None = None,
    inputs: list[str] | None = None,
    steps: int | None = None,
    output: str = "recipe.yaml",
) -> None:
    """Write a commented recipe: tokenizer, shards and pretraining of one language.

    Args:
        language: code of the language, as datasets have it: de, es, ar.
        size: demo (for a CPU), small (147M parameters), base (305M) or large (973M); demo on a CPU and base on a GPU if
            not given.
        device: the GPU to choose batch sizes and precision for (H200, H100, A100 …), or cpu; the device of this machine
            if not given.
        inputs: your text, as for `fat5 prepare`; web text of the language (CulturaX) if not given.
        steps: optimizer steps; as long as four passes over the text if not given.
        output: the recipe's file; one that is there is not overwritten.
    """
    from fat5.data.text.corpus import open_corpus
    from fat5.errors import ConfigurationError, check_whole, check_writable
    from fat5.files import write_output
    from fat5.train.config import LARGEST_COUNT

    if not language:
        raise ConfigurationError("is required", where="language", hint="Give its code: --language de")
    if steps is not None:
        check_whole(steps, "steps", most=LARGEST_COUNT)
    target = check_writable(output)
    if target.exists():
        raise ConfigurationError("exists already", where=target, hint="Choose another --output, or remove it first")
    if inputs:
        open_corpus(inputs)  # refuses what is missing, empty or no text
    from fat5.tasks.recipe import write_recipe

    write_output(target, write_recipe(language, size, device, inputs or [], steps, output))
    print(target)


def main(argv: list[str]) -> int:
    """Runs the verb."""
    from fat5.cli.parsing import parse

    init(**parse(init, argv, "init", words="inputs"))
    return 0
