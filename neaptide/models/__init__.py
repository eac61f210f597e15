"""Models on disk: where one comes from (sources), what a directory must hold (directory), how one is made (convert),
and how many hosts and revisions share its files (store, cache, blobs, hold).

The built-in guide lies in guide/. Nothing here runs a model, and nothing here is on a request's path.
"""
