"""`fat5 audit DIR… --output_dir OUT`: show what the model sees."""

import re
from typing import Any

from fat5.cli.parsing import parse
from fat5.data.examples.config import AuditConfig

SPECIALS = re.compile(r"(<extra_id_\d+>)|(\[[RSX]\])|(</s>)")
VERDICTS = {"ok": "green", "short documents": "yellow", "FAIL": "bold red"}


def main(argv: list[str]) -> int:
    """Audits prepared folders, prints the report, and returns 1 if the data break the specification."""
    config = AuditConfig(**parse(AuditConfig, argv, "audit", words="inputs"))
    from fat5.cli.terminal import Console
    from fat5.data.audit import audit

    report = audit(config)
    console = Console(highlight=False, soft_wrap=True)
    _examples(console, report)
    _mixture(console, report)
    _figures(console, report)
    console.print(f"wrote {config.output_dir}/audit.json and {config.output_dir}/audit.png", markup=False)
    return 1 if any(row["verdict"] == "FAIL" for row in report["mixture"]) else 0


def _examples(console: Any, report: dict[str, Any]) -> None:
    for row in sorted(report["shown"], key=lambda row: row["denoiser"]):
        console.print(f"{row['name']}, piece {row['piece']}", style="bold", markup=False)
        for side in ("inputs", "targets"):
            console.print(f"  {side:8}", end="", style="dim")
            console.print(_coloured(row[side]))
    console.print()


def _coloured(text: str) -> Any:
    from rich.text import Text

    coloured = Text(text.replace("\n", "⏎"))
    for match in SPECIALS.finditer(coloured.plain):
        style = "bold cyan" if match.group(1) else "bold magenta" if match.group(2) else "dim"
        coloured.stylize(style, *match.span())
    return coloured


def _mixture(console: Any, report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="denoisers: measured (asked)", title_justify="left")
    for heading in ("denoiser", "proportion", "corruption rate", "mean span", "sentinels", "verdict"):
        table.add_column(heading)
    for row in report["mixture"]:
        share, rate, span = row["proportion"], row["corruption_rate"], row["mean_span_length"]
        asked = "one span" if span["asked"] is None else f"{span['asked']:g}"
        limited = f", {row['limited_by_sentinels']:,} limited" if row["limited_by_sentinels"] else ""
        table.add_row(
            Text(row["name"]),
            f"{share['measured']:.4f} ({share['asked']:.4f})",
            f"{rate['measured']:.4f} ({rate['asked']:.4f})",
            f"{span['measured']:.2f} ({asked})",
            f"{row['sentinels_used']}{limited}",
            Text(row["verdict"], style=VERDICTS[row["verdict"]]),
        )
    console.print(table)


def _figures(console: Any, report: dict[str, Any]) -> None:
    now, better, words = report["budgets"], report["suggested"], report["tokenizer"]
    console.print(
        f"{report['reconstructed']:,} of {report['examples']:,} examples reconstruct exactly "
        f"({report['tokens']:,} tokens)"
    )
    console.print(
        f"fill {now['encoder_fill']:.2%} × {now['decoder_fill']:.2%} at encoder_tokens {now['encoder_tokens']}, "
        f"decoder_tokens {now['decoder_tokens']}; {now['examples_per_pack']:.1f} examples a pack"
    )
    line = f"suggested: encoder_tokens {better['encoder_tokens']}, decoder_tokens {better['decoder_tokens']}"
    if better["encoder_fill"] is not None:
        line += f" (fill {better['encoder_fill']:.2%} × {better['decoder_fill']:.2%})"
    console.print(line)
    console.print(f"sentinels used: {report['sentinels']['used']} of {report['sentinels']['available']}")
    console.print(
        f"tokenizer: {words['tokens_per_word']:.3f} tokens per word, {words['tokens_per_byte']:.4f} per byte, "
        f"unknown {words['unknown_rate']:.4%}"
    )
    for corpus in report["corpora"]:
        console.print(
            f"{corpus['folder']}: {corpus['documents']:,} documents, {corpus['tokens']:,} tokens, "
            f"{corpus['cut_documents']:,} cut, {corpus['short_documents']:,} too short; "
            f"{corpus['tokens_seen']:,} tokens seen, {corpus['share_seen']:.1%} (asked {corpus['share_asked']:.1%})",
            markup=False,
        )
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False)
