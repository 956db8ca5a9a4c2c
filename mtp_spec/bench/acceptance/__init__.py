"""`bench acceptance`: tokens per step, acceptance and speed-up over a grid of shapes, rules and temperatures.

Read `cells` (the grid), `questions` (the prompts), `running` (the loop), `journal` (what survives an interruption),
`metrics` (the numbers), `report` and `page` (where they go), `comparing` (two documents).
"""
