"""What tells the first person with a GPU whether this works there: see __main__.py."""
