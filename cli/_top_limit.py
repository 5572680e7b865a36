"""One limit: who holds it, who waits and why, its keys."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Static

from pglimits._words import room
from pglimits.errors import LimitNotFound, PglimitsError

from . import _output
from ._state import Rates, used
from ._top_live import LiveScreen
from ._top_table import Column, Page, cell

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from pglimits import Holder, Key, Reason, Usage, Waiter

_BAR = 20
_SPARKS = 60
_PAST_EVERY = 20.0
"""Seconds for which the last hour is not asked for again: a sample comes once a minute."""

HOLDERS = (
    Column("Key", 14),
    Column("Slots", 5, is_number=True),
    Column("Held", 7, is_number=True),
    Column("Left", 7, is_number=True),
    Column("Holder", 0),
    Column("Lease", 36, from_width=120),
    Column("Fence", 8, is_number=True, from_width=120),
)
QUEUE = (
    Column("Key", 14),
    Column("Place", 5, is_number=True),
    Column("Slots", 5, is_number=True),
    Column("Prio", 4, is_number=True),
    Column("Waits", 7, is_number=True),
    Column("Waiter", 0),
    Column("Why it waits", 0, from_width=120),
)
KEYS = (
    Column("Key", 0),
    Column("", _BAR),
    Column("Held", 8, is_number=True),
    Column("Level", 8, is_number=True),
    Column("Waiting", 7, is_number=True),
    Column("Fence", 10, is_number=True),
)
TABS = ("holders", "queue", "keys")


class LimitScreen(LiveScreen):
    """A limit, and a page of its holders, of its queue, or of its keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,backspace", "back", "Back"),
        Binding("tab", "tab(1)", "Next list", priority=True),
        Binding("shift+tab", "tab(-1)", show=False, priority=True),
        Binding("1", "show('holders')", show=False),
        Binding("2", "show('queue')", show=False),
        Binding("3", "show('keys')", show=False),
        Binding("r", "release", "Release"),
        Binding("e", "switch", "Enable/disable"),
    ]

    def __init__(self, name: str) -> None:
        super().__init__()
        self.page = Page(id="rows")
        self._facts = Static(id="facts")
        self._tabs = Static(id="tabs", classes="line")
        self._detail = Static(id="detail")
        self.limit_name = name
        self.tab = "holders"
        self._rates = Rates()
        self._past: list[float | None] = []
        self._past_at = -math.inf
        self._usage: Usage | None = None
        self._holders: dict[str, Holder] = {}
        self._queue: dict[str, tuple[Waiter, Reason]] = {}
        self._keys: dict[str, Key] = {}
        self._gone = False

    def compose(self) -> ComposeResult:
        yield self._where
        yield self._trouble
        yield self._facts
        yield self._tabs
        yield self.page
        yield self._detail
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.page.focus()

    async def look(self) -> None:
        limiter, name = self.top.limiter, self.limit_name
        found = await limiter.usage(names=[name], count=1)
        if not found:
            raise LimitNotFound(f"there is no limit named {name!r} any longer")
        self._usage = usage = found[0]
        rate = self._rates.look(found).get(name)
        if time.monotonic() > self._past_at + _PAST_EVERY:
            self._past = (await limiter._sparklines([name], 3600, _SPARKS)).get(name, [])
            self._past_at = time.monotonic()
        tab, page = self.tab, self.page
        page.of = {"holders": usage.leases, "queue": usage.waiting, "keys": usage.keys}[tab]
        rows, columns = await self._list(tab, usage)
        if tab != self.tab:  # it was changed meanwhile
            return
        if not rows and page.first:  # some have ended
            page.first = 0
            rows, columns = await self._list(tab, usage)
        keyed = tab == "keys" or usage.keys > 1 or any(key for key in self._own_keys())
        page.show(columns if keyed else columns[1:], rows if keyed else [(at, cells[1:]) for at, cells in rows])
        self._show_facts(usage, rate, self._past)
        self._show_detail()

    async def _list(self, tab: str, usage: Usage) -> tuple[list[tuple[str, list[Text]]], tuple[Column, ...]]:
        """The rows of a list, from where the page begins, and its columns."""
        limiter, name, count, first = self.top.limiter, self.limit_name, self.page.room, self.page.first
        if tab == "holders":
            found = await limiter.holders(name, count=count, offset=first)
            self._holders = {str(holder.lease_id): holder for holder in found}
            return [(at, self._of_holder(holder, usage)) for at, holder in self._holders.items()], HOLDERS
        if tab == "queue":
            self.page.of, queue = await limiter._queue(name, count, first)
            self._queue = {str(waiter.lease_id): (waiter, why) for waiter, why in queue}
            return [(at, self._of_waiter(waiter, why, usage)) for at, (waiter, why) in self._queue.items()], QUEUE
        keys = await limiter._busiest_keys(name, count, first)
        self._keys = {f"={key.key}": key for key in keys}
        return [(at, self._of_key(key, usage)) for at, key in self._keys.items()], KEYS

    def _own_keys(self) -> list[str]:
        if self.tab == "holders":
            return [holder.key for holder in self._holders.values()]
        return [waiter.key for waiter, _ in self._queue.values()]

    # What is shown.

    def _show_facts(self, usage: Usage, rate: float | None, past: list[float | None]) -> None:
        word, reason, style = self.of_state(usage)
        filled = _output.bar(used(usage), room(usage), _BAR)
        budget = _output.count(usage.limit, "slot")
        if usage.slot_decay_per_second:
            budget += f", {_output.rate(usage.slot_decay_per_second)} come back"
        if usage.keys > 1:
            budget += f", for each of {_output.number(usage.keys)} keys"
        if usage.max_waiters is not None:
            budget += f", at most {_output.number(usage.max_waiters)} waiting"
        use = f" {_output.number(usage.held)} held"
        if usage.slot_decay_per_second:
            use += f" · level {_output.number(usage.level)}"
        use += f" · {_output.number(usage.waiting)} waiting"
        if rate is not None:
            use += f" · {rate:,.1f} grants/s"
        lines = [
            Text.assemble((_output.one_line(usage.name), "bold"), "  ", (word, style), f": {reason}"),
            cell(budget + (f" · {usage.description}" if usage.description else "")),
            Text.assemble((filled, style), ("·" * (_BAR - len(filled)), "dim"), use),
        ]
        if any(value is not None for value in past):
            most = max(usage.limit, *(value or 0.0 for value in past), 1.0)
            lines.append(
                Text.assemble(("last hour ", "dim"), (_output.sparkline(past, most), self.top.colour("text-primary")))
            )
        width = self.app.size.width - 2
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        self._facts.update(Text("\n").join(lines))
        self._show_tabs(usage)

    def _show_tabs(self, usage: Usage) -> None:
        counts = {"holders": usage.leases, "queue": usage.waiting, "keys": usage.keys, self.tab: self.page.of}
        words: list[tuple[str, str]] = []
        for nth, tab in enumerate(TABS, 1):
            style = "bold reverse" if tab == self.tab else "dim"
            words += [(f" {nth} {tab.capitalize()} {_output.number(counts[tab])} ", style), (" ", "")]
        first, here = self.page.first, self.page.row_count
        if 0 < here < self.page.of:
            words.append((f" {first + 1:,} to {first + here:,}", "dim"))
        self._tabs.update(Text.assemble(*words))

    def _of_holder(self, holder: Holder, usage: Usage) -> list[Text]:
        return [
            cell(holder.key, self.top.colour("text-primary")),
            cell(_output.number(holder.slots)),
            cell(_output.duration((usage.now - holder.acquired_at).total_seconds())),
            cell(_output.duration((holder.expires_at - usage.now).total_seconds())),
            cell(_output.who(holder.holder)),
            cell(holder.lease_id, "dim"),
            cell(holder.fence, "dim"),
        ]

    def _of_waiter(self, waiter: Waiter, why: Reason, usage: Usage) -> list[Text]:
        return [
            cell(waiter.key, self.top.colour("text-primary")),
            cell(waiter.position),
            cell(_output.number(waiter.slots)),
            cell(waiter.priority or "-"),
            cell(_output.duration((usage.now - waiter.waiting_since).total_seconds())),
            cell(_output.who(waiter.holder)),
            cell(why.reason),
        ]

    def _of_key(self, key: Key, usage: Usage) -> list[Text]:
        full = usage.active and (key.held >= usage.limit or key.level > usage.limit - 1)
        style = self.top.colour("text-error" if key.waiting else "text-warning" if full else "text-success")
        filled = _output.bar(max(key.held, key.level), usage.limit, _BAR)
        return [
            cell(key.key or "''", self.top.colour("text-primary")),
            Text.assemble((filled, style), ("·" * (_BAR - len(filled)), "dim"), end=""),
            cell(_output.number(key.held)),
            cell(_output.number(key.level) if usage.slot_decay_per_second else "-"),
            cell(_output.number(key.waiting), style if key.waiting else "dim"),
            cell(key.fence, "dim"),
        ]

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        self._show_detail()

    def _show_detail(self) -> None:
        """All of the row under the cursor."""
        at = self.page.at or ""
        lines: list[str] = []
        if self.tab == "holders" and at in self._holders:
            holder = self._holders[at]
            lines = [
                _output.who(holder.holder),
                f"lease {holder.lease_id} · fence {holder.fence} · priority {holder.priority}",
                f"since {_output.moment(holder.acquired_at)}, until {_output.moment(holder.expires_at)}",
            ]
        elif self.tab == "queue" and at in self._queue:
            waiter, why = self._queue[at]
            earliest = "" if why.earliest is None else f"; at the earliest {_output.moment(why.earliest)}"
            lines = [why.reason + earliest, _output.who(waiter.holder), f"request {waiter.lease_id}"]
        elif self.tab == "keys" and at in self._keys:
            lines = [self._keys[at].key or "the key without a name"]
        self._detail.update(Text("\n".join(map(_output.one_line, lines)), no_wrap=True))

    def failed(self, error: PglimitsError) -> None:
        if not isinstance(error, LimitNotFound):
            return
        if not self._gone:
            self.top.say(error, "warning")
        self._gone = True
        self.action_back()  # or as soon as a question is answered that stands before it

    # Keys.

    def action_back(self) -> None:
        if self.is_current:
            self.app.pop_screen()

    def action_tab(self, by: int) -> None:
        self.action_show(TABS[(TABS.index(self.tab) + by) % len(TABS)])

    def action_show(self, tab: str) -> None:
        if tab != self.tab:
            self.tab = tab
            self.page.turn_to(0, 0)

    def on_page_turned(self, event: Page.Turned) -> None:
        self.look_now()

    def action_switch(self) -> None:
        self.run_worker(self.switch(self.limit_name))

    def action_release(self) -> None:
        if self.tab == "keys":
            self.top.say("Choose a holder or a waiter to release: press 1 or 2.")
        elif self.page.at is not None and self.may("force_release"):
            self.run_worker(self._release(self.page.at))

    async def _release(self, at: str) -> None:
        """End a lease, or take a request out of the line, once it is clear who that hits."""
        usage, name = self._usage, self.limit_name
        if usage is None:
            return
        if self.tab == "holders":
            holder = self._holders.get(at)
            if holder is None:  # it has ended since the key was pressed
                return
            held = _output.duration((usage.now - holder.acquired_at).total_seconds())
            waiting = _output.count(usage.waiting, "request waits now", "requests wait now")
            question = (
                f"Release {_output.count(holder.slots, 'slot')} of {name!r}?\n\n"
                f"Held for {held} by {_output.who(holder.holder)}.\n\n"
                f"The holder is not stopped: it finds out when it next renews. The lease ends on all its limits."
                f" Its slots go to whoever is next: {waiting}."
            )
            done, gone = f"Released {str(holder.lease_id)[:8]}", f"{str(holder.lease_id)[:8]} had ended already."
        else:
            queued = self._queue.get(at)
            if queued is None:
                return
            waiter, _ = queued
            waits = _output.duration((usage.now - waiter.waiting_since).total_seconds())
            question = (
                f"Take this request for {_output.count(waiter.slots, 'slot')} out of the line of {name!r}?\n\n"
                f"It has waited for {waits}: {_output.who(waiter.holder)}."
            )
            done, gone = (
                f"Took {str(waiter.lease_id)[:8]} out of the line",
                f"{str(waiter.lease_id)[:8]} waits no longer.",
            )

        async def release() -> str:
            return done if await self.top.limiter.force_release(at) else gone

        await self.do(question, "Release", release)
