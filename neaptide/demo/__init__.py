"""A compressed day on a real service, told as it happens and billed at its end: story → play → bill → page.

Here is the day's script, who plays it and what is made of it. How a service is started, asked and spoken to stands in
the command line; it hands those in.
"""
