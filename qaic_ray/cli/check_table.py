"""What `qaic-ray check` found, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qaic_ray.check.facts import Grade

if TYPE_CHECKING:
    from qaic_ray.check.check_step import Checked

_STYLES = {Grade.REFUSED: "red", Grade.REMARK: "yellow"}


def check_table(found: Checked) -> RenderableType:
    """A line for each finding: what is wrong, what to do, and where the rule stands."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in found.findings:
        text = Text(f"{one.place}: {one.says}")
        text.append(f"\n{one.remedy}", "bold")
        text.append(f"\n{one.rule}: {one.source}", "dim")
        table.add_row(Text(one.grade.value, _STYLES[one.grade]), text)
    for made in found.converted:
        table.add_row(Text("converted", "green"), Text(f"{found.folder}/{made.place}: {made.says}"))
    return Group(*([table] if table.row_count else []), _summary(found))


def _summary(found: Checked) -> Text:
    counts = {grade: sum(one.grade is grade for one in found.findings) for grade in Grade}
    target, card = found.target, found.target.card
    of = f"Apps {target.apps_text}" if target.apps else "any Apps version"
    of += f" and {card.name} cards" if card is not None else ""
    if not found.findings:
        return Text(f"Nothing found, for {of}.", "green")
    refused, remarks = counts[Grade.REFUSED], counts[Grade.REMARK]
    said = [
        *([f"{refused} would be refused"] if refused else []),
        *([f"{remarks} remark{'s' if remarks > 1 else ''}"] if remarks else []),
    ]
    return Text(f"{', '.join(said)}, for {of}.", "red" if refused else "yellow")
