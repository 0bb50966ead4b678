"""What changes values and never sizes, after the ranks are chosen."""
