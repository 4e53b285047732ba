"""Finds parameterised layers in TensorFlow graphs.

`tensorflow_graph_util` says what a node and its neighbours are, `graph_matcher` is a
small pattern language over them, `graph_patterns` and `layers` hold the patterns, and
`graph_search` registers what they find with a `LayerCollection`.
"""
