"""Where rows come from: one module a kind, each turning a `PrepareSpec` into a `Source`."""
