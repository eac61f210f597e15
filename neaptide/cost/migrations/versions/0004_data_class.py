"""Keys whose requests never go to a replica that is outside."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("inside", sa.Boolean(), nullable=False, server_default=sa.false()))
