"""A site's end of a real federation: its data, its rules, its ledger, and what it answers a coordinator."""
