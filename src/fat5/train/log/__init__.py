"""What a run says: its record, its display, its plots."""
