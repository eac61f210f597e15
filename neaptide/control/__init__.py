"""Observe, decide, act: which replicas there should be, what gateways are told, the admin API. Never on a request's
path."""
