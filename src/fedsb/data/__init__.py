"""Where rows come from, who holds which, and what a model reads of them."""
