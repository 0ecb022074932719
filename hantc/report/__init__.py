"""What a run leaves for people: `summary.json`, terminal tables and `report.html`."""
