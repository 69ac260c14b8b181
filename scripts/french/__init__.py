"""What french_tasks.py is made of: packages, their markup, near-duplicates."""
