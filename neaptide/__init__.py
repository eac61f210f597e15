"""Neaptide keeps an AI service at its latency goals for the least money.

Read types.py first: the nouns. A request walks gateway -> engine -> journal -> cost; docs/architecture.md draws it.
"""

__version__ = "0.1.0"
