"""`python -m vlqc`."""

from vlqc.cli import main

main()
