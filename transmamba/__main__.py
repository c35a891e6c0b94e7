"""`python -m transmamba`: the command line where its script is not installed."""

from transmamba.cli import main

main()
