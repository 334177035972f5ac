"""One client of OpenAI-compatible servers, for the builder of data and for the reward by a judge."""

from .cache import RequestCache
from .client import ChatClient, ClientStats
from .config import ServerConfig
from .failures import RequestFailed, ServerRefused, ServerUnavailable
from .replies import Completion, parse_object, parse_verdict, quote
from .tokens import TokenCounter, load_token_counter
