"""Text: corpora of any file form, read row by row, and their cleaning."""
