"""What goes wrong on the way to the Hub and back, as one plain line; and trying again where that can help."""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from json import JSONDecodeError
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from ..errors import UserError, is_full_disk, one_line, printable

_RETRIED = (408, 412, 429, 500, 502, 503, 504)  # 412: somebody else committed in between
_CLIENTS = ('httpx', 'httpx2', 'requests', 'urllib3')  # what one version of huggingface_hub or another is built on
_logger = logging.getLogger(__name__)
T = TypeVar('T')


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def attempt(
    what: str,
    action: Callable[[], T],
    repo_id: str = '',
    token: str | None = None,
    attempts: int = 4,
    wait: float = 2.0,
) -> T:
    """Do something with the Hub, several times if need be; a failure becomes a UserError without the token in it."""
    for done in range(attempts):
        _logger.info('%s', what)
        try:
            return action()
        except UserError:
            raise
        except Exception as e:
            trace = traceback.format_exc()
            explained = _explain(e, repo_id)
            if explained is None:
                raise
            reason, retry, pause = explained
        if token:
            trace, reason = trace.replace(token, '<token>'), reason.replace(token, '<token>')
        _logger.debug('%s', trace)
        if not retry or done + 1 == attempts:
            raise UserError(f'could not {what}: {reason}')
        pause = max(wait * 2**done, min(pause, 60.0))
        _logger.warning('could not %s: %s; trying again in %.0f s', what, reason, pause)
        time.sleep(pause)
    raise AssertionError('unreachable')


def _explain(error: Exception, repo_id: str) -> tuple[str, bool, float] | None:
    """Why something with the Hub failed, whether trying again can help, and the seconds the Hub asks to wait.

    None for what is no failure of Hub, network, machine or file.
    """
    causes = list(_causes(error))
    if any(is_full_disk(e) for e in causes if isinstance(e, (OSError, SafetensorError))):
        return 'the disk is full; free some space and run it again', False, 0.0
    if any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        return 'huggingface_hub is in offline mode; unset HF_HUB_OFFLINE', False, 0.0
    answer = next((e for e in causes if isinstance(e, HfHubHTTPError) and e.response is not None), None)
    if answer is not None:
        status = answer.response.status_code
        pause = _seconds(answer.response.headers.get('Retry-After', ''))
        return _explain_status(answer, status, repo_id), status in _RETRIED, pause
    if any(
        isinstance(e, ConnectionError | TimeoutError) or type(e).__module__.partition('.')[0] in _CLIENTS
        for e in causes
    ):
        return 'the connection to the Hub failed; see to the network and run it again', True, 0.0
    if isinstance(error, (AttributeError, IndexError, KeyError, OverflowError, TypeError, JSONDecodeError)):
        version = huggingface_hub.__version__
        return f'the Hub gave an answer that huggingface_hub {version} cannot read; try again later', False, 0.0
    if not isinstance(error, (OSError, RuntimeError, ValueError, SafetensorError)):
        return None
    # an OSError that is left is the client's, for a download of the wrong size
    return one_line(error), isinstance(error, OSError), 0.0


def _seconds(retry_after: str) -> float:
    """The seconds that the header Retry-After asks for, which may also be a date; 0 for anything else."""
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after[:9])
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError, OverflowError):  # no date, or one without a time zone
        return 0.0


def _explain_status(error: HfHubHTTPError, status: int, repo_id: str) -> str:
    owner = repo_id.partition('/')[0]
    if isinstance(error, RevisionNotFoundError):
        return 'the Hub has no such revision'
    if isinstance(error, RepositoryNotFoundError):  # before 401, which the Hub also answers for what it hides
        return (
            f'{repo_id} is not there as a model repository that this token can see; '
            'if the name is taken by something else, choose another'
        )
    if status == 401:
        return 'the Hub does not accept the token; run `hf auth login` again, or set HF_TOKEN to a valid one'
    if status == 403:
        return f'the token has no permission for this; use one that may write to the repositories of {owner}'
    if status == 412:
        return 'somebody else committed in the meantime; run it again'
    if status == 429:
        return 'the Hub asks for fewer requests; wait a while and run it again'
    if status >= 500:
        return f'the Hub has a fault (status {status}); run it again later'
    detail = printable(' '.join((getattr(error, 'server_message', None) or str(error)).split()), limit=500)
    return f'the Hub refuses it (status {status}): {detail}'
