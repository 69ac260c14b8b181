"""What is trained and run: the demo."""
