"""`python -m vlmoe.cli`."""

from vlmoe.cli import main

main()
