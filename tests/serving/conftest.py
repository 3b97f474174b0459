from collections.abc import Iterator

import pytest
from served import make_service, make_tagging, make_task, running

from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.tagging import AudioTagging


@pytest.fixture(scope="package")
def task() -> StreamingASR:
    return make_task()


@pytest.fixture(scope="package")
def tagging() -> AudioTagging:
    return make_tagging()


@pytest.fixture(scope="module")
def url(task: StreamingASR) -> Iterator[str]:
    """Of a server without a tagger."""
    with running(make_service(task)) as (url, _):
        yield url
