"""What a run writes for people: predictions, report, curves, model card, and the push to the Hub."""
