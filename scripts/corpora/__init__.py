"""What french_tasks.py and french_corpus.py share: packages, their markup, near-duplicates, splits."""
