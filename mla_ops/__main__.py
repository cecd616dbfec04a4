from mla_ops.cli.main import main

raise SystemExit(main())
