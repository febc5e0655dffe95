"""cleanlab: examples that harm the queries, as an issue of a Datalab.

import tda.integrations.cleanlab
lab.find_issues(issue_types={"harmful_value": {"values": "stores/my_run"}})
lab.get_issues("harmful_value")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import rankdata

from tda.integrations.partner import partner
from tda.integrations.sheet import Sheet, ids_of, sheet

if TYPE_CHECKING:
    from tda.run import Run

pandas: Any = partner("pandas", "pandas")
_Manager: Any = partner("cleanlab", "cleanlab.datalab.internal.issue_manager").IssueManager
_factory: Any = partner("cleanlab", "cleanlab.datalab.internal.issue_manager_factory")
_TASKS = ("classification", "regression", "multilabel")


class HarmfulValueIssueManager(_Manager):
    """An issue is an example whose value is reliably below zero (the flag "harmful").

    Its score is the share of examples worth less, ties by half: near 0 for the most harmful. An
    example that is not in the run scores 1. ``lab.get_info("harmful_value")`` also has value,
    ci_lo, ci_hi and flags of every example.
    """

    description = (
        "Training on these examples is predicted to make the model worse on the queries, "
        "and the sign of the prediction survives a false discovery rate of 5 %."
    )
    issue_name = "harmful_value"

    def find_issues(
        self, values: str | Path | Run | Sheet, id_column: str | None = None, **_: Any
    ) -> None:
        """values: see `tda.integrations.sheet.sheet`; id_column: `tda.integrations.sheet.ids_of`.

        Raises DataError where no example of the Datalab is in the run.
        """
        columns = ("value", "ci_lo", "ci_hi", "flags")
        found = sheet(values).of(ids_of(self.datalab.data, id_column), columns)
        worth = np.array([np.nan if v is None else v for v in found["value"]])
        known = np.isfinite(worth)
        score = np.ones(len(worth))
        score[known] = (rankdata(worth[known]) - 0.5) / known.sum()
        is_issue = np.array(["harmful" in (flags or ()) for flags in found["flags"]])
        self.issues = pandas.DataFrame(
            {f"is_{self.issue_name}_issue": is_issue, self.issue_score_key: score}
        )
        self.summary = self.make_summary(score=1 - float(is_issue.mean()))
        self.info = {"num_not_in_run": int((~known).sum()), **found}


for _task in _TASKS:
    _factory.register(HarmfulValueIssueManager, task=_task)
