"""Named exact rewrites of graphs of leaves."""
