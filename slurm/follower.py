"""The launcher on the job's other nodes: a Ray node for as long as rank 0 wants one."""

import time
from pathlib import Path

from harness.errors import UserError
from slurm import queue
from slurm.life import Life
from slurm.processes import Scratch, wait_until
from slurm.ray_cluster import STOP_LIMIT_S, RayNode, RayStartError

_LEADER_GONE_AFTER_S = 20.0
_POLL_S = 0.5


class Follower:
    """One life on one of the other nodes."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.rendezvous = life.rendezvous
        self.name = {"node": life.place.node_name}

    def run(self) -> None:
        """Join, stay, leave."""
        try:
            with Scratch(Path(self.life.profile.node.scratch)) as scratch:
                ray = self.life.ray_node(scratch)
                assert ray is not None  # arrays have one node, and so no followers
                try:
                    self.serve(ray)
                finally:
                    done = self.rendezvous.get("done") or {"exit_status": 1}
                    ray.stop(keep_logs=self.life.keeps_logs(int(done["exit_status"])))
        except UserError as error:  # this node cannot take part
            self.tell_loss(f"error: {error}")
        self.rendezvous.put(f"left-{self.life.place.rank}", self.name)

    def serve(self, ray: RayNode) -> None:
        """Be part of rank 0's cluster until it is over; a node that cannot be stays until rank 0 has decided."""
        wait_until(lambda: self.rendezvous.get("head") is not None or self.over(), ray.profile.ray.start_limit_s)
        head = self.rendezvous.get("head")
        if head is None and (self.life.interrupted() or self.rendezvous.get("done") is not None):
            return  # rank 0 never came to start Ray
        if head is None:
            self.life.say(f"rank 0 wrote nothing into {self.rendezvous.folder}: is it on storage that all nodes share?")
            return
        try:
            ray.start_worker(head)
        except (RayStartError, UserError) as error:
            self.tell_loss(str(error))
            return
        self.rendezvous.put(f"up-{self.life.place.rank}", self.name)
        while not self.over():
            if not ray.alive():
                self.tell_loss("Ray's processes on this node died")
                return
            time.sleep(_POLL_S)

    def tell_loss(self, why: str) -> None:
        """Report, and wait for rank 0: SLURM would otherwise judge by this launcher's early end."""
        if self.rendezvous.get("done") is not None:
            return
        self.life.say(why)
        self.rendezvous.put(f"lost-{self.life.place.rank}", self.name | {"why": why})
        wait_until(self.over, float("inf"), every_s=_POLL_S)

    def over(self) -> bool:
        """Whether rank 0 is through, or gone, or SLURM's SIGKILL is near."""
        self.rendezvous.beat()
        if self.rendezvous.get("done") is not None:
            return True
        if 0 in self.rendezvous.silent_ranks(max(_LEADER_GONE_AFTER_S, self.life.profile.requeue.node_lost_after_s)):
            self.life.say("no sign of life from rank 0 any more")
            return True
        if self.life.signalled is None:
            return False
        leaving = self.rendezvous.get("leaving") or {"grace_s": queue.DEFAULT_KILL_WAIT_S - 3 * STOP_LIMIT_S}
        return time.monotonic() > self.life.signalled_at + float(leaving["grace_s"]) + STOP_LIMIT_S
