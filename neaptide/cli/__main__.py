"""`python -m neaptide.cli`: the same as the `neaptide` command."""

from neaptide.cli import main

main()
