"""The front door: HTTP in, the link or HTTP out. Decides who waits and who goes where; never what a model can do."""
