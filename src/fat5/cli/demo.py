"""`fat5 demo`: runs a recipe's whole chain on the sample corpus and prints the results."""

import sys

from fat5.cli.parsing import parse
from fat5.tasks.config import DemoConfig


def main(argv: list[str]) -> int:
    config = DemoConfig(**parse(DemoConfig, argv, "demo", recipe="demo"))
    from fat5.tasks.demo import demo

    summary = demo(config, say=lambda line: print(line, flush=True), progress=sys.stderr.isatty())
    show(summary, config.output_dir)
    return 0


def show(summary: dict, folder: str) -> None:
    """Prints what the demo did: figures, samples, and the next commands."""
    print(
        f"\n{summary['parameters']:,} parameters, {summary['train_tokens']:,} tokens in {summary['seconds']:.0f} s "
        f"({summary['tokens_per_second']:,.0f} a second), whole demo {summary['demo_seconds']:.0f} s"
    )
    print(
        f"validation loss {summary['val_loss_first']:.3f} → {summary['val_loss_last']:.3f} nats a token "
        f"(unigram entropy of the same targets: {summary['unigram_entropy']:.3f})"
    )
    for denoiser, loss in summary["val_loss_by_denoiser"].items():
        print(f"  {denoiser:28} {loss:.3f}")
    print(
        f"fill: encoder {summary['encoder_fill']:.1%}, decoder {summary['decoder_fill']:.1%}; "
        f"tokens dropped: {summary['tokens_dropped']}\n"
    )
    for sample in summary["samples"]:
        print(f"  {sample['prompt']}\n    → {sample['text']}")
    print(
        f"\n{folder}/loss.png      the curves\n{folder}/model/        loads in stock transformers: "
        f"AutoModelForSeq2SeqLM.from_pretrained({folder + '/model'!r})\n"
        f"next: fat5 generate --model {folder} 'Le fichier ___ contient la configuration.'"
    )
