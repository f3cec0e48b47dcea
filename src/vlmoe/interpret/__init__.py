"""See what each expert does, and test that it is the cause."""
