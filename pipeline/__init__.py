"""The DAG: recipes, graph, keys, resume, tracking, report, command line."""
