"""Until when a key is good, for what, and its limits."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("expires_s", sa.Double()))
    op.add_column("keys", sa.Column("scopes", sa.Text(), server_default="[]", nullable=False))
    for name in ("rpm", "tpm", "concurrency"):
        op.add_column("keys", sa.Column(name, sa.BigInteger()))
