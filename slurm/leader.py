"""The launcher of rank 0: starts everything, supervises the command, ends everything, and acts on the verdict."""

import signal
import time
from pathlib import Path

from harness.errors import UserError
from slurm import queue, records
from slurm.command import Command
from slurm.life import Life
from slurm.processes import Scratch, wait_until
from slurm.ray_cluster import RayNode, RayStartError
from slurm.resume import EXIT_NOT_STARTED, Cause, Verdict, grace_s, judge, judge_start

_OTHERS_LEAVE_LIMIT_S = 8.0
_POLL_S = 0.1
_LOOK_EVERY_S = 1.0  # at what lies on shared storage


class Leader:
    """One life on the first node."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.place, self.rendezvous, self.profile = life.place, life.rendezvous, life.profile
        self.others = life.place.world - 1

    def run(self) -> Verdict:
        """Live; returns the verdict, which SLURM knows by then if it is to requeue the job."""
        refusal = self.begin()
        if refusal is not None:
            self.life.say(f"not started again: {refusal.reason}")
            self.finish(refusal)
            self.dismiss(refusal.exit_status, refusal.reason)
            return refusal
        verdict = Verdict("finish", EXIT_NOT_STARTED, "the launcher failed")
        try:
            with Scratch(Path(self.profile.node.scratch)) as scratch:
                ray = None
                try:
                    ray = self.life.ray_node(scratch)
                    verdict = self.supervise(ray, scratch)
                    if verdict.action == "finish":
                        self.finish(verdict)
                finally:
                    self.dismiss(verdict.exit_status, verdict.reason)
                    if ray is not None:
                        ray.stop(keep_logs=self.life.keeps_logs(verdict.exit_status))
        finally:
            wait_until(self.others_left, _OTHERS_LEAVE_LIMIT_S)
        return self.conclude(verdict)

    def begin(self) -> Verdict | None:
        """Open the record of this life, unless it may not begin."""
        earlier, requeue = self.life.earlier, self.profile.requeue
        last = earlier[-1] if earlier else {"verdict": "none"}
        ended = bool({"stopped_by", "verdict"} & last.keys()) and last.get("stopped_by") != Cause.ENDED_BY_SLURM.value
        refusal = judge_start(len(earlier), ended, requeues=requeue.max, on_node_loss=requeue.on_node_loss)
        if refusal is None:
            self.rendezvous.make_token()
            self.life.note(node=self.place.node_name, nodes=self.place.world)
            self.life.say(f"life {len(earlier) + 1} of job {self.place.job_id} on {self.place.world} node(s)")
        return refusal

    def supervise(self, ray: RayNode | None, scratch: Scratch) -> Verdict:
        """From the start of Ray to the end of the command."""
        try:
            environ = self.life.environ(scratch) if ray is None else self.start_cluster(ray)
        except RayStartError as error:
            if not self.life.interrupted():
                self.life.say(str(error))
                worked_before = any("command_started_unix_s" in life for life in self.life.earlier)
                return self.judge(EXIT_NOT_STARTED, Cause.NODE_LOST if worked_before else None)
        if self.life.interrupted():  # asked to leave before there was a command to ask
            return self.judge(128 + signal.SIGTERM, self.noted_cause())
        command = Command(self.life.submission, self.life.index, environ)
        self.life.note(command_started_unix_s=time.time())
        problem = command.start()
        if problem is not None:
            self.life.say(problem)
        cause = self.watch(command, ray)
        self.life.note(command_ended_unix_s=time.time())
        self.life.say(f"the command ended with {command.exit_status}")
        return self.judge(command.exit_status, cause)

    def start_cluster(self, ray: RayNode) -> dict[str, str]:
        """Bring up Ray on all nodes; returns the command's environment. Raises `RayStartError`."""
        head = ray.start_head()
        self.rendezvous.put("head", head)
        complete = wait_until(lambda: self.settled(ray), self.profile.ray.start_limit_s)
        folder = self.rendezvous.folder
        if self.rendezvous.ranks("lost") or not ray.alive():
            raise RayStartError(f"Ray did not start on all nodes; what it said is in {folder}/ray-start-*.log")
        if not complete:
            missing = sorted(set(range(1, self.place.world)) - set(self.rendezvous.ranks("up")))
            raise RayStartError(f"no sign of rank {missing} in {folder}; is it on storage that all nodes share?")
        self.life.say(f"Ray is up on {self.place.world} node(s) at {head['address']}, dashboard {head['dashboard']}")
        return ray.env() | {"RAY_ADDRESS": head["address"], "RAY_API_SERVER_ADDRESS": head["dashboard"]}

    def settled(self, ray: RayNode) -> bool:
        """Whether waiting for the other nodes has come to an end, good or bad."""
        self.rendezvous.beat()
        complete = len(self.rendezvous.ranks("up")) == self.others
        return complete or self.life.interrupted() or bool(self.rendezvous.ranks("lost")) or not ray.alive()

    def watch(self, command: Command, ray: RayNode | None) -> Cause | None:
        """Wait for the command's end; ask it to leave when a signal or a lost node says so. Returns why, if so."""
        cause, next_look = None, 0.0
        while command.running():
            now = time.monotonic()
            if self.life.interrupted() or now >= next_look:
                next_look = now + _LOOK_EVERY_S
                self.rendezvous.beat()
                if cause is None and (cause := self.reason_to_leave(ray)) is not None:
                    self.ask_to_leave(command, cause)
            time.sleep(_POLL_S)
        if cause is None and self.life.interrupted():  # the signal ended the command before it was seen here
            cause = self.noted_cause()
        return cause

    def noted_cause(self) -> Cause:
        """Why a signal asked this life to leave, now in its record."""
        cause = self.life.cause(self.life.job())
        self.life.note(stopped_by=cause.value)
        return cause

    def reason_to_leave(self, ray: RayNode | None) -> Cause | None:
        """A signal, or the loss of a node that the profile does not want ignored."""
        if self.life.interrupted():
            return self.life.cause(self.life.job())
        if ray is None:
            return None
        if not ray.alive():
            self.life.say("Ray's processes on the head node died")
            return Cause.NODE_LOST
        silent = self.rendezvous.silent_ranks(self.profile.requeue.node_lost_after_s)
        gone = sorted({*self.rendezvous.ranks("lost"), *silent})
        if not gone or self.life.story.get("lost_ranks") == gone:
            return None
        policy = self.profile.requeue.on_node_loss
        self.life.say(f"lost the Ray node of rank {gone}; requeue.on_node_loss = {policy!r}")
        self.life.note(lost_ranks=gone)
        return None if policy == "ignore" else Cause.NODE_LOST

    def ask_to_leave(self, command: Command, cause: Cause) -> None:
        """Pass the request on, with as much time as there is."""
        kill_wait_s = queue.kill_wait_s() if self.place.under_slurm else queue.DEFAULT_KILL_WAIT_S
        grace = grace_s(cause, self.life.job(), warn_s=self.profile.requeue.warn_s, kill_wait_s=kill_wait_s)
        command.ask_to_leave(grace)
        self.rendezvous.put("leaving", {"grace_s": grace})
        self.life.note(stopped_by=cause.value)
        self.life.say(f"{cause.value}: the command is asked to leave within {grace:.0f} s")

    def judge(self, exit_status: int, cause: Cause | None) -> Verdict:
        """Decide, with what SLURM says at this moment."""
        job = self.life.job()
        return judge(
            exit_status,
            cause,
            requeues_left=self.profile.requeue.max - len(self.life.earlier),
            on_node_loss=self.profile.requeue.on_node_loss,
            still_ours=job is None or job.state == "RUNNING",
        )

    def finish(self, verdict: Verdict) -> None:
        """Make the end durable: from here on, running the task again does nothing."""
        records.record_finish(
            self.life.task_folder, verdict.exit_status, verdict.reason, lives=len(self.life.earlier) + 1
        )

    def others_left(self) -> bool:
        """Whether all other nodes have cleaned up, those that are lost left out."""
        silent = self.rendezvous.silent_ranks(self.profile.requeue.node_lost_after_s)
        return {*self.rendezvous.ranks("left"), *silent} >= set(range(1, self.place.world))

    def dismiss(self, exit_status: int, reason: str) -> None:
        """Tell the other nodes that it is over."""
        self.rendezvous.put("done", {"exit_status": exit_status, "reason": reason})

    def conclude(self, verdict: Verdict) -> Verdict:
        """Write the end of this life; go back to the queue if that is the verdict."""
        self.life.note(
            verdict=verdict.action, exit_status=verdict.exit_status, reason=verdict.reason, ended_unix_s=time.time()
        )
        if verdict.action == "requeue":
            self.life.say(f"back to the queue: {verdict.reason}")
            if self.place.under_slurm:
                try:
                    queue.requeue(self.place.job_id)
                except UserError as error:
                    self.life.say(f"could not be put back into the queue: {error}")
        return verdict
