"""Router: which of the engine replicas answers a request.

The replica whose cache holds the longest prefix of the prompt saves the most computing, but what everybody asks for must not end up on one
replica alone. So: let `load` be a replica's samples in flight, `least` the smallest load, and `share` the part of the prompt that a
replica has. It is a candidate while

    load <= least + share * (SLACK + SLACK_SHARE * least)

and of the candidates that with the longest prefix is taken, then the least loaded, then the one that was sent nothing for longest. A hot
prefix thus spreads to a second replica as soon as the first is so much busier, and from then on both have it. That a long match wins only
while loads are balanced is the idea of SGLang's cache-aware router, which has two fixed thresholds for it; the rule above, which lets a
match count by its share, is our own.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from jaxserve.errors import EngineUnavailable, JaxserveError, Overloaded
from jaxserve.page_key import extend_keys, short_names
from jaxserve.request import EngineInfo, Request
from jaxserve.rpc.client import EngineClient, Generation, Submission

SLACK = 8  # samples
SLACK_SHARE = 0.5
# A prompt's pages beyond these are not looked at: hashing them would hold up the event loop (1 us each), and so long a match is enough.
MAX_PAGES_COMPARED = 1024
RETRY_INTERVAL = 0.5  # seconds


class Router:
    """Spreads requests over replicas. A request that a replica lost before it yielded anything is sent to another one, once.

    Args:
        clients: one a replica.
        by_prefix: whether the engines have a prefix cache.
    """

    def __init__(self, clients: Sequence[EngineClient], by_prefix: bool = True):
        self.clients = tuple(clients)
        self._by_prefix = by_prefix and len(self.clients) > 1
        self._turns = list(self.clients)  # the one that was sent nothing for longest is the first
        # Lost by one replica, while the others have no room for them yet.
        self._waiting: set[Submission] = set()
        for client in self.clients:
            client.rescue = self._rescue
            client.routes_by_prefix = self._by_prefix

    @property
    def available(self) -> bool:
        """Whether any replica can be asked now."""
        return any(client.available and not client.leaving for client in self.clients)

    @property
    def info(self) -> EngineInfo:
        """What the replicas have in common; the longest request is one that all of them take.

        Raises:
            EngineUnavailable: none was reached yet.
        """
        infos = [client.info for client in self.clients if client.info is not None]
        if not infos:
            raise EngineUnavailable("the model is still loading")
        total, most_input = min(info.max_total_tokens for info in infos), min(info.max_input_tokens for info in infos)
        if infos[0].max_total_tokens == total and infos[0].max_input_tokens == most_input:
            return infos[0]
        return replace(infos[0], max_total_tokens=total, max_input_tokens=most_input)

    def submit(self, request: Request) -> Generation:
        """Send a validated request to a replica.

        Raises:
            EngineUnavailable: there is none.
        """
        generation = Generation(request)
        self.send(generation)
        return generation

    def send(self, submission: Submission) -> None:
        """Send what no replica has now, to one that has neither lost nor refused it. Raises EngineUnavailable where there is none."""
        tried = submission.lost_by | submission.refused_by
        available = [c for c in self._turns if c.available and not c.leaving and c.replica not in tried]
        if not available:
            raise EngineUnavailable
        pages = self._pages(submission.request, available[0].info) if self._by_prefix else []
        client = _choose(submission.request, pages, available)
        client.send(submission, pages)
        self._turns.remove(client)
        self._turns.append(client)

    def fail_all(self, error: JaxserveError) -> None:
        """Let everything that is in flight from here fail."""
        for client in self.clients:
            client.fail_all(error)
        for submission in self._waiting:
            submission.fail(error)
        self._waiting.clear()

    def start(self) -> None:
        """Connect to all replicas in the background."""
        for client in self.clients:
            client.start()

    async def close(self) -> None:
        """Hang up."""
        await asyncio.gather(*(client.close() for client in self.clients))

    def _pages(self, request: Request, info: EngineInfo | None) -> list[int]:
        keys: list[bytes] = []
        if info is not None:
            num_pages = min(len(request.prompt_token_ids) // info.page_size, MAX_PAGES_COMPARED)
            extend_keys(keys, request, request.prompt_token_ids, info.page_size, num_pages)
        return short_names(keys)

    def _rescue(self, submission: Submission, error: EngineUnavailable | Overloaded, replica: int) -> bool:
        """Send what has not begun to another replica.

        Once only where a replica was lost: a request that kills engines must not go round them all. A replica without room may be asked
        again later by what another one lost, because that was accepted.
        """
        (submission.lost_by if isinstance(error, EngineUnavailable) else submission.refused_by).add(replica)
        if len(submission.lost_by) > 1:
            return False
        try:
            self.send(submission)
        except EngineUnavailable:
            if not submission.lost_by or not submission.refused_by:
                return False
            self._waiting.add(submission)
            asyncio.get_running_loop().call_later(RETRY_INTERVAL, self._send_again, submission)
        return True

    def _send_again(self, submission: Submission) -> None:
        if submission not in self._waiting:
            return
        self._waiting.discard(submission)
        if submission.wanted:
            submission.refused_by.clear()
            try:
                self.send(submission)
            except EngineUnavailable as error:
                submission.fail(error)


def _choose(request: Request, pages: Sequence[int], clients: Sequence[EngineClient]) -> EngineClient:
    """The replica that the rule above prefers; of those that it holds equal the first."""
    least = min(client.num_in_flight for client in clients)
    # What scores its prompt computes all of it.
    matches = {client: client.prefixes.match(pages) if request.params.prompt_logprobs is None else 0 for client in clients}

    def is_candidate(client: EngineClient) -> bool:
        page_size = client.info.page_size if client.info is not None else 0
        share = matches[client] * page_size / len(request.prompt_token_ids)
        return client.num_in_flight <= least + share * (SLACK + SLACK_SHARE * least)

    candidates = filter(is_candidate, clients)
    return min(candidates, key=lambda client: (-matches[client], client.num_in_flight))
