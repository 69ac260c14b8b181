"""`fat5 convert`: a T5-family model to another format, with proof that the copy computes the same."""

from fat5.cli.parsing import parse
from fat5.convert import ConvertConfig


def main(argv: list[str]) -> int:
    """Converts and prints the report."""
    config = ConvertConfig(**parse(ConvertConfig, argv, "convert", words="model"))
    from fat5.convert import convert

    print("\n".join(convert(config).lines()))
    return 0
