"""`fat5 convert`: a T5-family model to another format, with proof that the copy computes the same."""

from fat5.cli.parsing import parse


def main(argv: list[str]) -> int:
    """Prints the report."""
    from fat5.convert.conversion import ConvertConfig, convert

    for line in convert(ConvertConfig(**parse(ConvertConfig, argv, "convert", positional={"model": "?"}))).lines():
        print(line)
    return 0
