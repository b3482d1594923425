"""What a person is told where the line to the coordinator's link cannot be made: who refused, and what to do.

Out of scope: the line itself (client/fleet), looking for the cause step by step (client/doctor).
"""

from http import HTTPStatus

from httpx import HTTPStatusError, ProxyError

PROXY_EXPECTED = (
    "Expected HTTPS_PROXY (or ALL_PROXY, HTTP_PROXY) as http://HOST:PORT. The relay cannot use what it names: SOCKS "
    "and other kinds are not supported. Name an HTTP proxy that tunnels (CONNECT), or remove the variable."
)


def answered(failure: BaseException | None) -> int | None:
    """Return the status that the link answered with; None if it is no answer of the link's."""
    return failure.response.status_code if isinstance(failure, HTTPStatusError) else None


def explained(address: str, cause: BaseException | None) -> str:
    """Say why the link at `address` cannot be used, and what a person can do."""
    if isinstance(cause, ProxyError):
        return _of_a_proxy(address, str(cause))
    status = answered(cause)
    if status == HTTPStatus.UNAUTHORIZED:
        return (
            f"The link at {address} does not let this site in: its node key is not enrolled, was revoked or renewed, "
            "or its clock is wrong (it may be 5 s ahead, 300 s behind). `fedmedgan-site doctor` looks at the clock; "
            "after `renew`, join with the new invitation; else ask the coordinator."
        )
    if status is not None:
        return (
            f"The link at {address} does not let this site in. After a crash it counts the site as online for up to a "
            "minute and lets it in then; if this goes on, ask the coordinator whether the site is enrolled or revoked."
        )
    return (
        f"The link at {address} cannot be used: {cause}. If its certificate is not the pinned authority's and no proxy "
        "inspects TLS here, ask the coordinator for a new invitation and compare the fingerprint by phone."
    )


def _of_a_proxy(address: str, said: str) -> str:
    if said.startswith(str(HTTPStatus.PROXY_AUTHENTICATION_REQUIRED.value)):
        return (
            f"The proxy that HTTPS_PROXY names wants a user and password ({said}): HTTPS_PROXY=http://USER:PASSWORD@"
            "HOST:PORT. `fedmedgan-site doctor` tries it."
        )
    return (
        f"The proxy that HTTPS_PROXY names does not tunnel to {address} ({said}). Ask its administrator to allow "
        f"CONNECT to {address}; `fedmedgan-site doctor` tries it."
    )
