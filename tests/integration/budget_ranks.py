"""`torchrun ... -m tests.integration.budget_ranks SPEC.json`: a trial whose ranks each leave what their search made."""

import sys
from pathlib import Path

import torch

import sbs
from harness import stages
from harness.config import TrialSpec
from harness.pressure import BudgetPressure

if __name__ == "__main__":
    sbs.use_compiled(False)
    spec = TrialSpec.model_validate_json(Path(sys.argv[1]).read_text())
    finish = BudgetPressure.finish

    def leave_states(self: BudgetPressure) -> dict:
        taken = finish(self)
        rank = self._ranks.rank
        torch.save({"net": self.net.state_dict(), **taken}, Path(spec.run_dir) / f"rank{rank}.pt")
        return taken

    BudgetPressure.finish = leave_states
    stages.run(spec)
