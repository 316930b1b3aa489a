"""A trained classifier or ranker behind HTTP: `examples/serve.py` is its command line.

A request goes from `app` (interfaces, limits) to a backend: an `Engine` in the same process, or
`replicas` of it on a Ray cluster. The engine turns texts into tokens, and a `Batcher` packs the
tokens of all requests that wait.
"""
