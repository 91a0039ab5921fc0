"""Everything that crosses a process border: typed messages, their bytes, and how a peer introduces itself."""
