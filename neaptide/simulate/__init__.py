"""Arrivals, a world and policies, walked through without a clock or a socket: what a scaling policy costs and reaches
before it may decide live. Nothing here serves anybody; docs/decisions/0020 holds the nouns and the walk.

    formats    a file → Rates or Requests        synthetic  the same without a file
    arrivals   the two nouns                     counts     rates → requests a tick
    sources    what the command line names       world      what is simulated
    fluid      policies side by side over rates  bound      the clairvoyant schedule
    compare    all of it → a Comparison          outcome    → JSON
    policies   every policy by name              report     → a page (plots, svg, texts)

and request by request (docs/decisions/0022):

    sample     rates → single requests           replay     requests, settings, policy → served
    steps      what an engine's step takes       replicas   launched, ready, leaving, paid (cold, spot)
    exact      an engine, step by step           routes     who gets a request
    fast       the same, by jumps                singly     a comparison in these tiers
    learn      an engine from its step log       measured   policies on such an engine (docs/decisions/0033)
"""
