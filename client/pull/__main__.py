"""`python -m client.pull`: the pull's own process."""

from client.pull.command import main

main()
