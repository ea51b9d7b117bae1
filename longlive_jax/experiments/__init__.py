"""Experiments: declarative studies, what they measure, and how they are reported.

A study (`study.Study`) is a Python file that says what is compared, on what, and how it is measured.
`runner` runs its cells (one condition with one seed each) and stores every one when it is done,
`table` and `plots` make of them what `report` (Markdown) and `page` (one HTML file) show.

What is added in one place: a metric in `metrics.METRICS`, an axis in `study.AXES`, a kind of prompts in
`tasks`.
"""
