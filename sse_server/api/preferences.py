"""``/api/preferences``: which event types reach a user."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web
from pydantic import ConfigDict, Field, RootModel

from sse_server.api.bodies import Answer, Body, parse
from sse_server.api.notifications import EVENT_TYPE, STORE, EventTypeName, json_response
from sse_server.errors import DatabaseError, RequiredEventType, UnknownEventType
from sse_server.sessions import signed_in
from sse_server.store import Preference, Store

# Limits
MOST_CHANGES = 100

# A name that no event type can have (event_types_name_format).
_NO_NAME = ""


class Switch(Body):
    enabled: bool


class Switches(RootModel[dict[str, bool]]):
    """Event types and whether they are to be on; those that are not named stay as they are."""

    model_config = ConfigDict(
        strict=True,
        hide_input_in_errors=True,
        json_schema_extra={"examples": [{"new_message": True, "status_change": False}]},
    )

    root: dict[str, bool] = Field(max_length=MOST_CHANGES)


class PreferenceAnswer(Answer):
    event_type: EventTypeName
    description: str
    enabled: bool
    required: bool = Field(description="Cannot be switched off.")


class PreferencesAnswer(Answer):
    """All event types, by name."""

    preferences: list[PreferenceAnswer]


async def get(request: web.Request) -> web.Response:
    """GET /api/preferences"""
    who = await signed_in(request)
    preferences = await request.app[STORE].preferences(who.user_id)
    return json_response({"preferences": [preference.as_json() for preference in preferences]})


async def put(request: web.Request) -> web.Response:
    """PUT /api/preferences/{event_type}: switch one on or off."""
    who = await signed_in(request)
    enabled = (await parse(request, Switch)).enabled
    name = request.match_info["event_type"]
    preferences = await _change(request.app[STORE], who.user_id, {name: enabled})
    return json_response(preferences[name].as_json())


async def patch(request: web.Request) -> web.Response:
    """PATCH /api/preferences: switch several on or off, all of them or none."""
    who = await signed_in(request)
    changes = (await parse(request, Switches)).root
    preferences = await _change(request.app[STORE], who.user_id, changes)
    return json_response({"preferences": [item.as_json() for item in preferences.values()]})


async def _change(store: Store, user_id: str, changes: Mapping[str, bool]) -> dict[str, Preference]:
    """Switch event types on or off.

    Returns: All preferences, by event type.

    Raises:
        UnknownEventType: One of the types does not exist; nothing was changed.
        RequiredEventType: One of them cannot be switched off; nothing was changed.
    """
    # Names come from outside; not all of them are text that PostgreSQL takes.
    wanted = {
        name if EVENT_TYPE.fullmatch(name) else _NO_NAME: enabled
        for name, enabled in changes.items()
    }
    try:
        preferences, done = await store.set_preferences(user_id, wanted)
    except DatabaseError as exc:
        if exc.sqlstate != "23503":
            raise
        # One of the types went away at this very moment; now it is unknown.
        preferences, done = await store.set_preferences(user_id, wanted)
    known = {preference.event_type: preference for preference in preferences}
    if unknown := sorted(wanted.keys() - known.keys()):
        raise UnknownEventType(
            "There is no such event type.",
            unknown=[name for name in unknown if name != _NO_NAME],
            known=sorted(known),
        )
    if not done:
        raise RequiredEventType(
            "Everybody gets notifications of this type.",
            required=sorted(
                name for name, enabled in wanted.items() if known[name].required and not enabled
            ),
        )
    return known
