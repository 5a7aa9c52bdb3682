"""report.html: the plan as one page that needs nothing else. Numbers are formatted here, never in it.

Each section is one function, from what is planned to a small frozen record, and one template
`templates/report/<section>.html.j2` that lays that record out. `page` is their sequence.
"""

from .page import Report, render_report

__all__ = ["Report", "render_report"]
