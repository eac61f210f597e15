"""Engines and the replica around them: tokens in, tokens out. Nothing here knows of gateways, prices or fleets."""
