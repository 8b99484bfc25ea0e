"""What is left of a run for people and programs: schema, cards, tables, page. No torch in here."""
