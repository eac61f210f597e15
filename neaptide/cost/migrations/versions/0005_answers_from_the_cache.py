"""Usage tells whether its answer was another request's, and what share of the list price it costs."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("usage", sa.Column("cache", sa.Text(), nullable=False, server_default=""))
    op.add_column("usage", sa.Column("price_millis", sa.Integer(), nullable=False, server_default="1000"))
